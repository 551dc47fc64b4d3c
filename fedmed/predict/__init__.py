"""A trained run applied to pictures, volumes and site files (`fedmed predict`)."""
