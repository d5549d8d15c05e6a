"""What judges a model: features, Fréchet distance, PSNR and SSIM."""
