"""Online learning: a policy learns from its own answers (PPO).

One world of ranks holds two trained models, the actor and the critic, and two frozen ones as copies on
the host: the reference, which is the actor's start, and the reward model. A frozen copy replaces the
weights of the trained model of the same architecture for a forward pass.
"""
