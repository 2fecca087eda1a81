"""One page from what was measured, counted and projected; and two measurements compared."""
