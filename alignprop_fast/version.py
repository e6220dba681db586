"""The version, said once: the package, its metadata and its caches read it here."""

__version__ = "0.1.0"
