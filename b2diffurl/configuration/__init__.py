"""What the user asks for: settings, their limits and rules, and the plan that follows from them."""
