"""Run files with the right columns and wrong values: refused in a sentence, or shown on all pages."""
