"""Who may call: bearer tokens, TLS certificates, and what the settings ask for of both."""
