"""Training of the embedded models on the synthetic world.

    world clips --autoencoder--> latents on disk --transformer--> a diffusers folder

`python -m ditflow.mini.training --out DIR` runs the stages; `kinds` lists the models and what each is made of. A killed
run continues from its last checkpoint: everything random in a step depends on the seed and the step number alone, so on
a CPU in 32 bits it ends with the same weights as an uninterrupted run.

Nothing that runs a model imports this package.
"""
