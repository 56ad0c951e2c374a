"""What happens in a forward pass: who acts, and what each kind of adapter does there."""
