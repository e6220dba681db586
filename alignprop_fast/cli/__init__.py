"""The command line `alignprop-fast`: commands, their options, and their output."""
