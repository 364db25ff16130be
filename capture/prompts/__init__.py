"""Prompts: from lists, records and files of people to numbered texts. Imports no model."""
