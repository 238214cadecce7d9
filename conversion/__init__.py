"""Everything around the published model files: converting, building, verifying and showing repositories, and the command line."""
