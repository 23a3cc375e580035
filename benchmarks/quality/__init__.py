"""What the recipes cost in quality: small models trained many times, compared seed by seed."""
