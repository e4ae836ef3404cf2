"""`steersman distill`: a student learns a teacher's whole distributions, on its own answers or on given ones."""
