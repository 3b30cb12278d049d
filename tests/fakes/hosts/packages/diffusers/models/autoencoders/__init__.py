"""As in diffusers, its file lies here."""
