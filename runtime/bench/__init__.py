"""Measures every mode in one run, and prints what each cost."""
