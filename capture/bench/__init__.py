"""Measurements of capture: ``python -m capture.bench``. Nothing else imports them, save tests."""
