"""Build, ship and measure transformers on phones and boards."""
