"""Tokens: a prompt's own text, coloured by what the routers did, and one token in all layers."""
