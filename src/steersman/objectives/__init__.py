"""What offline verbs minimise: losses over rows of data, with their looks at held-out rows."""
