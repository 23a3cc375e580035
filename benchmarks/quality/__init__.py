"""The quality of the recipes: small models trained many times, compared seed by seed."""
