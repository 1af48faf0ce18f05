"""Who may call: bearer tokens, TLS certificates, and the settings for both.

Imports `errors`, `settings` and `watched_files`. Public are `certificates` (Certificates, ServerCertificate),
`policy` (SecurityConfig), `tokens` (Role, Tokens, role_of).
"""
