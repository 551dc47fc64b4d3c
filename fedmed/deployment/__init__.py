"""Real sites: the coordinator's and the hospital's processes, their keys and certificates, and what each side allows."""
