"""People in the loop: what they judged is stored, collected in a browser, and read by the trainers."""
