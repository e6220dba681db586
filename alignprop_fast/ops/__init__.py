"""One file per op: reference, choice of the implementation, public function. Ops know nothing of diffusion models."""
