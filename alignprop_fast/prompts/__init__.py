"""Prompt sets, files of prompts, and how much of a prompt a text encoder reads."""
