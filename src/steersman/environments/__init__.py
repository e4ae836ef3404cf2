"""Episodes of several turns: tools, environments, games and simulated users, exact at every token."""
