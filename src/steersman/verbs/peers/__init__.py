"""Settings of TRL, LLaMA-Factory and OpenRLHF: how they are read, and what each says in our keys."""
