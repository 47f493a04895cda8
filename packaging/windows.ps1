# Builds dist\edgespec-VERSION-windows-x86_64.zip. Not tested.
# Needs Python 3.11+ and the Visual C++ build tools: powershell -File packaging\windows.ps1
$ErrorActionPreference = "Stop"
Set-Location (Split-Path $PSScriptRoot)
function Run { & $args[0] $args[1..($args.Length)]; if ($LASTEXITCODE) { throw "edgespec: $($args[0]) failed" } }

$env:PYTHONHASHSEED = "0"
$env:SOURCE_DATE_EPOCH = git log -1 --format=%ct
$venv = "build\venv"; $python = "$venv\Scripts\python.exe"
if (-not (Test-Path $python)) { Run py -m venv $venv }

# One DLL of kernels per processor generation, as on Linux (packaging/wheel.sh).
$cmake = (Resolve-Path packaging\llama.cmake).Path.Replace("\", "/")
$env:CMAKE_ARGS = "-DGGML_NATIVE=OFF -DGGML_BACKEND_DL=ON -DGGML_CPU_ALL_VARIANTS=ON -DLLAVA_BUILD=OFF " +
    "-DCMAKE_INSTALL_BINDIR=llama_cpp/lib -DCMAKE_INSTALL_LIBDIR=llama_cpp/lib -DCMAKE_PROJECT_llama_cpp_INCLUDE=$cmake"
$wheels = "build\wheels"
if (-not (Test-Path "$wheels\llama_cpp_python-*.whl")) {
    $wanted = (Select-String -Path pyproject.toml -Pattern '"(llama-cpp-python==[^"]+)"').Matches[0].Groups[1].Value
    Run $python -m pip wheel --no-deps --no-cache-dir --no-binary llama-cpp-python --wheel-dir $wheels $wanted
}
Run $python -m pip install --constraint packaging\constraints.txt pyinstaller (Get-Item "$wheels\llama_cpp_python-*.whl").FullName .
Run $python -P -m PyInstaller --noconfirm --clean --workpath build\pyinstaller --distpath build\dist packaging\edgespec.spec
$version = & $python -P -c "import edgespec; print(edgespec.__version__)"
$name = "edgespec-$version-windows-x86_64"
New-Item -ItemType Directory -Force dist | Out-Null
Remove-Item -Recurse -Force -ErrorAction SilentlyContinue "dist\$name"
Move-Item build\dist\edgespec "dist\$name"
Run "dist\$name\edgespec.exe" --version
Compress-Archive -Force "dist\$name" "dist\$name.zip"
(Get-FileHash "dist\$name.zip" -Algorithm SHA256).Hash.ToLower() + "  $name.zip" | Set-Content dist\SHA256SUMS
