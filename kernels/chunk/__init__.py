"""The portable backend: see common.py for the idea, and a file for each family."""
