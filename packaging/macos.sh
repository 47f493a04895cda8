#!/bin/sh
# Signs and notarizes dist/edgespec-VERSION-darwin-ARCH, one folder, for distribution. Not tested: it needs a Mac
# and a developer identity. After `make binary`:
#   packaging/macos.sh "Developer ID Application: NAME (TEAM)" KEYCHAIN_PROFILE
# KEYCHAIN_PROFILE is the profile saved by `xcrun notarytool store-credentials`.
set -eu
cd "$(dirname "$0")/.."
identity=$1 profile=$2
program=$(dirname "$(readlink dist/edgespec)")
entitlements=build/entitlements.plist
# The hardened runtime loads libraries of the same team only, hence all are signed below; callbacks of ctypes need
# writable and executable memory.
cat > "$entitlements" <<'PLIST'
<?xml version="1.0" encoding="UTF-8"?>
<!DOCTYPE plist PUBLIC "-//Apple//DTD PLIST 1.0//EN" "http://www.apple.com/DTDs/PropertyList-1.0.dtd">
<plist version="1.0"><dict><key>com.apple.security.cs.allow-unsigned-executable-memory</key><true/></dict></plist>
PLIST
# Libraries must be signed before the program.
find "dist/$program/_internal" -type f \( -name '*.so' -o -name '*.dylib' -o -name 'Python' \) -print0 |
    xargs -0 codesign --force --timestamp --options runtime --sign "$identity"
codesign --force --timestamp --options runtime --entitlements "$entitlements" --sign "$identity" "dist/$program/edgespec"
codesign --verify --strict --verbose "dist/$program/edgespec"
ditto -c -k --keepParent "dist/$program" "dist/$program.zip"
xcrun notarytool submit "dist/$program.zip" --keychain-profile "$profile" --wait
# A ticket cannot be stapled to a folder: Gatekeeper requests it online once. For Macs that are never online, put
# the folder into a disk image, and sign, notarize and staple that.
spctl --assess --type execute --verbose "dist/$program/edgespec" || true
(cd dist && shasum -a 256 "$program.zip" > SHA256SUMS)
