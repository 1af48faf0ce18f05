"""The direct transport: gRPC over libnghttp2, on one receiving thread, with epoll."""
