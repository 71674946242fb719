"""What lies between the contract and a backend: host calls, sessions over frames, deadlines, captured output."""
