"""Scripts a person runs beside training."""
