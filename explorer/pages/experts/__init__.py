"""Experts: what one expert is for, how specialised all of them are, and who takes a text."""
