"""What others wrote, within limits: JSON, replies of servers, text for a terminal, users' code."""
