"""What ``python -m explorer`` does: one module a command. Nothing else imports them."""
