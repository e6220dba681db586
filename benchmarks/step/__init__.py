"""Steps of training and their parts: seconds and bytes, measured and as planned."""
