# Homebrew formula: builds from source with Homebrew's Python. Not tested: there is no release for `url` and
# `sha256` yet, and no Mac. `brew install --build-from-source ./packaging/homebrew/edgespec.rb`
class Edgespec < Formula
  include Language::Python::Virtualenv

  desc "Language models on a laptop, with lossless speculative decoding"
  homepage "https://github.com/edgespec/edgespec"
  license "Apache-2.0"
  head "https://github.com/edgespec/edgespec.git", branch: "main"

  depends_on "cmake" => :build
  depends_on "ninja" => :build
  depends_on "python@3.12"

  def install
    system "python3.12", "-m", "venv", libexec
    # Compiled for this Mac, with Metal, instead of a prebuilt wheel.
    system libexec/"bin/pip", "install", "--no-binary", "llama-cpp-python",
           "--constraint", "packaging/constraints.txt", "."
    bin.install_symlink libexec/"bin/edgespec"
    system libexec/"bin/python", "-P", "packaging/man.py", share
  end

  test do
    assert_match version.to_s, shell_output("#{bin}/edgespec --version") unless head?
    assert_match "smollm2-135m", shell_output("#{bin}/edgespec models")
  end
end
