"""How well a generated video keeps the reference's motion, measured on finished videos."""
