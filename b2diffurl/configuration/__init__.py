"""What is asked for: settings, their limits and rules, and the plan that follows from them."""
