"""Device profiles: one TOML file per target. See devices/README.md."""
