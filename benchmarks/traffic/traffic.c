/* A load of gRPC calls that differ as real clients' do, in a closed loop, with every answer checked. One thread.
 *
 *     traffic --connect HOST:PORT --requests FILE [--connections N] [--streams N] [--seconds S] [--log FILE]
 *             [--style grpcio|indexed] [--user-agent TEXT] [--timeout] [--traceparent] [--tls]
 *
 * Every connection keeps as many calls in flight as it has streams, until the time is over; what is in flight then may
 * finish. The requests of FILE (requests.c) are sent in turn. The log has 16 bytes a call: its end in microseconds since
 * the epoch (8), the microseconds it took (4), whether the answer was right (4). Prints one JSON object. Certificates
 * are not verified. Exit status: 0, or 1 with a message where no load could be made.
 */
#include "traffic.h"

#include <arpa/inet.h>
#include <errno.h>
#include <getopt.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define MAX_CONNECTIONS 256
#define PATIENCE_US 5000000 /* for answers, once no more is sent */

void die(const char *format, ...) {
    va_list arguments;
    fputs("traffic: ", stderr);
    va_start(arguments, format);
    vfprintf(stderr, format, arguments);
    va_end(arguments);
    fputc('\n', stderr);
    exit(1);
}

void *allocate(size_t count, size_t size) {
    void *memory = calloc(count, size);
    if (!memory)
        die("out of memory");
    return memory;
}

static uint64_t clock_us(clockid_t id) {
    struct timespec time;
    clock_gettime(id, &time);
    return (uint64_t)time.tv_sec * 1000000 + (uint64_t)time.tv_nsec / 1000;
}

uint64_t now_us(void) {
    static uint64_t offset;
    if (!offset)
        offset = clock_us(CLOCK_REALTIME) - clock_us(CLOCK_MONOTONIC);
    return clock_us(CLOCK_MONOTONIC) + offset;
}

static int connect_to(const char *address) {
    char host[64];
    const char *colon = strrchr(address, ':');
    struct sockaddr_in to = {.sin_family = AF_INET};
    if (!colon || (size_t)(colon - address) >= sizeof host)
        die("expected --connect HOST:PORT, got %s", address);
    memcpy(host, address, (size_t)(colon - address));
    host[colon - address] = 0;
    to.sin_port = htons((uint16_t)atoi(colon + 1));
    if (inet_pton(AF_INET, host, &to.sin_addr) != 1)
        die("expected an IPv4 address before the colon, got %s", address);
    int fd = socket(AF_INET, SOCK_STREAM, 0), on = 1;
    if (fd < 0 || connect(fd, (struct sockaddr *)&to, sizeof to))
        die("cannot connect to %s: %s", address, strerror(errno));
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    return fd;
}

static SSL_CTX *tls_context(void) {
    static const unsigned char alpn[] = "\2h2";
    SSL_CTX *context = SSL_CTX_new(TLS_client_method());
    if (!context || SSL_CTX_set_alpn_protos(context, alpn, 3))
        die("OpenSSL cannot be set up");
    SSL_CTX_set_verify(context, SSL_VERIFY_NONE, NULL); /* the benchmark's own certificate, over loopback */
    SSL_CTX_set_mode(context, SSL_MODE_ENABLE_PARTIAL_WRITE | SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER);
    return context;
}

static void watch(int epoll, int how, struct Connection *connection) {
    struct epoll_event event = {EPOLLIN | (connection->blocked ? EPOLLOUT : 0), {.ptr = connection}};
    if (epoll_ctl(epoll, how, connection->fd, &event))
        die("epoll_ctl: %s", strerror(errno));
}

/* Until `seconds` are over and what was in flight then is answered. */
static void run(struct Load *load, struct Connection *connections, unsigned count, double seconds) {
    int epoll = epoll_create1(0);
    uint64_t end = now_us() + (uint64_t)(seconds * 1e6);
    for (unsigned i = 0; i < count; i++) {
        connection_write(&connections[i]);
        watch(epoll, EPOLL_CTL_ADD, &connections[i]);
    }
    for (;;) {
        uint64_t now = now_us();
        load->stopping = now >= end;
        if (load->stopping && (!load->flying || now > end + PATIENCE_US))
            return;
        struct epoll_event events[MAX_CONNECTIONS];
        int ready = epoll_wait(epoll, events, MAX_CONNECTIONS, 10);
        if (ready < 0 && errno != EINTR)
            die("epoll_wait: %s", strerror(errno));
        for (int i = 0; i < ready; i++) {
            struct Connection *connection = events[i].data.ptr;
            bool was_blocked = connection->blocked;
            if (events[i].events & ~(uint32_t)EPOLLOUT)
                connection_read(connection);
            else
                connection_write(connection);
            if (connection->blocked != was_blocked)
                watch(epoll, EPOLL_CTL_MOD, connection);
        }
    }
}

static void print_summary(const struct Load *load, double seconds) {
    const struct Totals *totals = &load->totals;
    struct rusage usage;
    getrusage(RUSAGE_SELF, &usage);
    double cpu = (double)(usage.ru_utime.tv_sec + usage.ru_stime.tv_sec) +
                 1e-6 * (double)(usage.ru_utime.tv_usec + usage.ru_stime.tv_usec);
    printf("{\"sent\": %llu, \"right\": %llu, \"inexact\": %llu, \"wrong\": %llu, \"failed\": %llu, "
           "\"unanswered\": %llu, \"cpu_seconds\": %.6f, \"seconds\": %.6f, \"first_problem\": \"",
           (unsigned long long)totals->sent, (unsigned long long)totals->right, (unsigned long long)totals->inexact,
           (unsigned long long)totals->wrong, (unsigned long long)totals->failed, (unsigned long long)load->flying, cpu,
           seconds);
    for (const char *at = totals->first; *at; at++)
        putchar(*at < ' ' || *at > '~' || *at == '"' || *at == '\\' ? '?' : *at);
    puts("\"}");
}

static unsigned number(const char *option, const char *text, unsigned most) {
    char *end;
    long value = strtol(text, &end, 10);
    if (*end || value < 1 || value > (long)most)
        die("expected 1 to %u after --%s, got %s", most, option, text);
    return (unsigned)value;
}

int main(int argc, char **argv) {
    static struct option options[] = {
        {"connect", 1, NULL, 'a'}, {"requests", 1, NULL, 'r'},    {"connections", 1, NULL, 'c'},
        {"streams", 1, NULL, 'm'}, {"seconds", 1, NULL, 'd'},     {"log", 1, NULL, 'l'},
        {"style", 1, NULL, 's'},   {"user-agent", 1, NULL, 'u'},  {"timeout", 0, NULL, 't'},
        {"tls", 0, NULL, 'T'},     {"traceparent", 0, NULL, 'p'}, {"version", 0, NULL, 'v'},
        {NULL, 0, NULL, 0},
    };
    struct Load load = {.streams = 1, .metadata = {.style = INDEXED, .user_agent = "traffic"}};
    const char *address = NULL, *requests = NULL, *log = NULL;
    unsigned count = 1;
    double seconds = 1.0;
    for (int option; (option = getopt_long(argc, argv, "", options, NULL)) != -1;) {
        switch (option) {
        case 'a': address = optarg; break;
        case 'r': requests = optarg; break;
        case 'c': count = number("connections", optarg, MAX_CONNECTIONS); break;
        case 'm': load.streams = number("streams", optarg, MAX_STREAMS); break;
        case 'd': seconds = atof(optarg); break;
        case 'l': log = optarg; break;
        case 's':
            if (strcmp(optarg, "grpcio") && strcmp(optarg, "indexed"))
                die("expected --style grpcio or indexed, got %s", optarg);
            load.metadata.style = strcmp(optarg, "grpcio") ? INDEXED : GRPCIO;
            break;
        case 'u': load.metadata.user_agent = optarg; break;
        case 't': load.metadata.timeout = true; break;
        case 'T': load.metadata.tls = true; break;
        case 'p': load.metadata.traceparent = true; break;
        case 'v':
            printf("libnghttp2 %s, %s\n", nghttp2_version(0)->version_str, OpenSSL_version(OPENSSL_VERSION_STRING));
            return 0;
        default: return 1;
        }
    }
    if (!address || !requests || optind < argc)
        die("expected --connect HOST:PORT and --requests FILE; the source's first lines describe the options");
    signal(SIGPIPE, SIG_IGN);
    load.plan = plan_load(requests);
    load.metadata.authority = address;
    if (log && !(load.log = fopen(log, "wb")))
        die("cannot write %s: %s", log, strerror(errno));
    SSL_CTX *tls = load.metadata.tls ? tls_context() : NULL;
    struct Connection *connections = allocate(count, sizeof *connections);
    for (unsigned i = 0; i < count; i++)
        connection_open(&connections[i], &load, connect_to(address), tls);
    uint64_t began = now_us();
    run(&load, connections, count, seconds);
    if (load.log && fclose(load.log))
        die("the log cannot be written: %s", strerror(errno));
    print_summary(&load, 1e-6 * (double)(now_us() - began));
    return 0;
}
