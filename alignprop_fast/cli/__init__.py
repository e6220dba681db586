"""Commands, their options, and what they show: `alignprop-fast`."""
