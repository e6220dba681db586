"""Prompt sets, files of prompts, and the limits of text encoders."""
