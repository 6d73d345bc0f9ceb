"""Search: from a sensitivity table and a budget to a plan with a certificate."""
