"""Everything around the published model files: convert, build, verify and show repositories; the command line."""
