"""The autoencoder: wavelet VAE, hybrid latent, and the model that joins them."""
