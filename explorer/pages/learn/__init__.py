"""Learn: a short tour on the open run, how to read every page, and the glossary."""
