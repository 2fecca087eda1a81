"""Measurements and reports; imports everything, imported by nothing."""
