"""Turn a fine-tuning recipe into jobs, a half-precision model and complete predictions."""

__version__ = "0.1.0"
