"""Replaces layers in diffusers' networks by this package's ops and lean layers."""
