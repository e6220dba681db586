"""One file per op: reference, backend choice and public function. Nothing here knows of diffusion models."""
