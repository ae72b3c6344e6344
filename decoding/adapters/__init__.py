"""Thin shells that let other engines decode with this project's strategies; each imports its engine only when used."""
