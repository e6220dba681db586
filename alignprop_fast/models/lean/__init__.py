"""The package's ops and lean layers put into the networks of diffusers."""
